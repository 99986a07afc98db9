"""The report of a run: numbers, words and figures on one page."""
