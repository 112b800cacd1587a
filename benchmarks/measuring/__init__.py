"""What the benchmarks are made of: workloads, the ways that are compared, measuring, recording, plotting."""
