"""`seedbed preflight`: is this machine ready to join? Every check says what it found and, where needed, what to do.

report        the checks as values, a table, JSON
software      versions, DeepSpeed
machine       devices and memory against the job, disk
material      base model, data files
connection    keys, gateway, clock, registry
estimate      how much memory a training job takes
verb          all of it in order
"""
