"""The one exception that a user's mistake raises: a single line that names the key and the fix."""


class ConfigError(ValueError):
    """Bad input. The command line prints its message alone and exits with code 2."""
