"""Models that run on other servers, over HTTP.

``backend`` distributes the texts of a job over a model's servers. ``server`` sends requests to one server in its
``dialect`` and with its ``quirks``, reads the ``answers``, and interprets ``failures``. ``watch`` uses the ``probe`` to
decide which servers get requests, and the ``breaker`` of each server remembers the decision. The ``pool`` has a server
for each address that the ``resolver`` finds, and chooses a server for each request.
"""
