"""fp8moe in other people's models.

The module of a framework needs it installed, and nothing imports that module unless it is there: `convert` takes it up
if the model is made with it.
"""
