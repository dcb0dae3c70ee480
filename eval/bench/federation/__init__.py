"""Measuring federation: an aggregator in processes of its own, simulated devices, and what may befall both.

aggregator      the server as a user starts it; killed and started again
wire            HTTP for simulated devices
fleet           simulated devices, in a process of their own
proxy           a network that can be cut
postgresql      a database server of the bench's own
books           an aggregator's database, checked by someone else
load            results a second, latency, memory, bytes
kill            kills and cuts, and what the books say afterwards
dropout         devices that leave, and what is in vain
hostile         devices that lie
training        devices with a model, against training alone
"""
