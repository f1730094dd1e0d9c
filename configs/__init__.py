"""One small function per experiment: get_config(mode) -> ConfigDict."""
