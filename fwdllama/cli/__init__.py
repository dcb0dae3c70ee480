"""The command line: each command is a module, and nothing heavy is imported before a command runs.

stdout carries what a command found, stderr how it goes. Whatever goes wrong is one line, `error: ...`, and an exit
code.
"""
