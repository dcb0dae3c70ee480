"""Measuring training itself: every figure that the documentation gives, against its bar, by one command.

cli             `fwdllama bench`: which items, one after the other, whatever becomes of any of them
measure         what an item is: a measurement, the figures it gives and the bars they must reach
child           other processes, where everything that loads a model happens
record          the results file and the machine it was made on
table           results for people
runs            training and scoring on real questions; the demo
backprop_race   forward-only against back-propagation
directions      a direction for each example against one for the whole batch
costs           of a probe, of memory, of starting
speed           a probe against what it could cost, and time that is not the engine's
examples        how many examples a probe should see
plan            planned memory against measured
safety          equal ledgers, and runs that are killed
federation      an aggregator under load, killed, lied to
backprop        exact gradients in torch; the opponent, and a tool of development
"""
