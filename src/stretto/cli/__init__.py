"""The command line: ``main`` reads the verb, each verb has a file of its own.

No file here imports torch; a verb asks the room that does its work only once its input has been
checked, so that ``--help`` and a mistyped key answer at once.
"""
