"""What a run writes for its report (analysis.py), and the page on runs: python -m train.report."""
