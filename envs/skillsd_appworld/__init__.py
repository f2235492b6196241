"""AppWorld as a text environment for Gymnasium. `gymnasium.make("skillsd_appworld:skillsd/AppWorld-v0")` imports and builds it.

The engine runs in processes of its own interpreter (worker/); this package imports the standard library and Gymnasium alone.
"""

import gymnasium

from skillsd_appworld.env import AppWorldEnv

__all__ = ["AppWorldEnv"]

gymnasium.register("skillsd/AppWorld-v0", entry_point="skillsd_appworld.env:AppWorldEnv", order_enforce=False, disable_env_checker=True)
