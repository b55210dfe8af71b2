"""The command line: the parser, the commands by topic, presets, the demo and the doctor."""
