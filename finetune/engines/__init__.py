"""Two ways to load a model and train it, behind the same functions (`engine.Engine`): `plain` and `unsloth`.

`choose` says which, and why. What runs before `Engine.prepare` imports no heavy library: choose, refusals, the tops of both engines.
"""
