"""The configuration file: YAML becomes frozen values, and every problem is reported with its line."""
