"""What the operator decides: settings of the process (``GATEWAY_*``) and the registry of models (``models.yaml``).

The only readers of files and of the environment. Both give frozen values, or one ``ConfigError`` with every problem.
"""
