"""Watching a federation: what has happened, as one value, and the table, terminal and web page that show it.

state, fold               values, and how an event changes them: pure
estimate                  how long the stage still takes
reader                    a run directory as events, also while others write it
table, live, web, page    what a person sees; sparkline and svg draw curves
remote                    the same of a coordinator on another machine
"""
