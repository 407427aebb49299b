"""The operator's configuration: settings of the process (``GATEWAY_*``) and the registry of models (``models.yaml``).

Only this package reads configuration files and the environment. It returns frozen values, or raises one ``ConfigError``
with every problem.
"""
