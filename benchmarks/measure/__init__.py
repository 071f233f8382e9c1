"""What the benchmarks share: tools and cases, measured processes, one evaluator, reports."""
