"""The one exception for input that a user can mend."""


class ConfigError(ValueError):
    """Wrong settings, files or data: one line that names the key, file or level to change."""
