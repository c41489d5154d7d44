"""Two ways to load a model and train it, behind the same functions (`engine.Engine`): `plain` and `unsloth`.

`choose` says which, and why. What comes before `Engine.prepare` is light: choose, refusals, and the tops of the two engines.
"""
