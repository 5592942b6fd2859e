"""Stand-in: values that the common tests set on configs without sub-configs, which a CAStreamConfig is not."""

config_common_kwargs = {}
