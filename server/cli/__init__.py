"""The operator's commands; one file for each group, found by `fwdllama` through its entry points.

Those that speak to an aggregator over HTTP need nothing but the base install; what needs the extra `server` is imported when it is run.
"""
