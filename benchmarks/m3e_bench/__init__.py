"""The benchmark suite: questions put to engines side by side, records, comparisons, reports.

This file stays empty of imports: the engines' processes load it in environments that have none of ours.
"""
