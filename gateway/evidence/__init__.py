"""What came of each experiment: counts of its arms, the log of exposures, the test of the split."""
