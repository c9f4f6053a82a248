"""Benchmarks: burnish and its peers measured side by side on the machine at hand, with the raw samples kept."""
