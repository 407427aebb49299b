"""Models that run on other servers, over HTTP.

``backend`` spreads the texts of a job over a model's servers; ``server`` asks one of them, in its ``dialect`` and with its
``quirks``, reads its ``answers``, and says what a failure means (``failures``). ``watch`` decides with the ``probe`` which
servers are sent requests, and the ``breaker`` of each remembers it. The ``pool`` has a server for each address that the
``resolver`` finds, and chooses one for a request.
"""
