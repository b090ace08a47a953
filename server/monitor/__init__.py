"""Watching a federation: what has happened, as one value, and the table, terminal and web page that show it.

state, fold, jobs         values, and how an event changes them: pure; details reads what events hold
estimate                  how long the stage still takes
reader                    a run directory as events, also while others write it
document, remote          a status as JSON, and that of a coordinator on another machine
table, live, changes      what a person sees in a terminal and in a log; words says times, sizes and curves
web, script, prometheus   what the gateway serves
"""
