"""Graph passes of River Compile: FX graph in, FX graph out. They know no device and read no configuration file."""
