"""Reports: the cycles an engine recorded and the clock's accounts of them, written many ways.

summary   numbers as plain dicts, for --json and for every other writer
stat      the perf-stat-like text
trace     Chrome trace-event JSON that Perfetto opens
"""
