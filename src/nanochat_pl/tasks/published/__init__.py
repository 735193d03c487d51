"""Published benchmarks and conversation data sets, one file each."""
