"""Measuring federation: an aggregator in processes of its own, simulated devices, and what may befall both.

aggregator      the server as a user starts it; killed and started again
wire            HTTP for simulated devices
fleet           simulated devices, in a process of their own
load            results a second, latency, memory, bytes
"""
