"""`seedbed join`: a participant of a federation on another machine, as a Flower SuperNode that is kept alive.

address, keys, tasks, gpus
                          what the user says, as values
contact                   what the coordinator says of itself (GET /seedbed.json)
place                     its directory, with the node file that the ClientApp reads
supernode, supervise      the SuperNode's process, and who starts it again when it ends
sight                     what a person sees of it
verb                      all of it in order
"""
