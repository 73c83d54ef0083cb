"""Ask a privacy question, answer it reproducibly: plan, run, score, scorecard, report."""
