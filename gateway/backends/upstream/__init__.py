"""Models that run on other servers, over HTTP.

``dialects`` knows how a server is asked, ``server`` asks one and keeps note of whether it works (``breaker``), ``backend``
spreads the texts of a job over all of a model's.
"""
