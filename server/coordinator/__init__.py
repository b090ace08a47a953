"""`seedbed coordinator`: one group of processes that runs a federation for participants on other machines.

request       what the user asks for
bundle        the stub of a Flower app that names our ServerApp and ClientApp
services      command lines of SuperLink, registry and gateway
control       what the SuperLink is asked: to run the federation, and which nodes it knows
pulse         whether they live: each is asked what only a process that works can answer
members       keeps the SuperLink's nodes equal to the keys directory
supervision   starts all of them, watches, starts again, ends
verb          all of it in order
"""
