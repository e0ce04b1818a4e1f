"""``inferhub``: the publisher's program. Keys, bundles, the signed store, and commands to the fleet.

Each verb lives in a module of ``tools/hub`` and is imported when it is asked for; ``inferhub VERB --help`` has an
example of each.
"""

from __future__ import annotations

from typing import Final

import click

from tools.hub.cli import LazyGroup

VERBS: Final = {
    "keygen": "tools.hub.cli_store:keygen",
    "init": "tools.hub.cli_store:init",
    "add-team": "tools.hub.cli_store:add_team",
    "retire-team": "tools.hub.cli_keys:retire_team",
    "show-keys": "tools.hub.cli_keys:show_keys",
    "rotate-keys": "tools.hub.cli_keys:rotate_keys",
    "renew": "tools.hub.cli_keys:renew",
    "quantize": "tools.hub.cli_quantize:quantize",
    "inspect": "tools.hub.cli_inspect:inspect",
    "pack": "tools.hub.cli_bundle:pack",
    "publish": "tools.hub.cli_bundle:publish",
    "promote": "tools.hub.cli_bundle:promote",
    "deprecate": "tools.hub.cli_status:deprecate",
    "revoke": "tools.hub.cli_status:revoke",
    "export": "tools.hub.cli_export:export",
    "verify": "tools.hub.cli_store:verify",
    "refresh-timestamp": "tools.hub.cli_store:refresh_timestamp",
    "store": "tools.hub.cli_gc:store_group",
    "ls": "tools.hub.cli_store:list_models",
    "show": "tools.hub.cli_store:show",
    "deploy": "tools.hub.fleet_cli:deploy",
    "cancel": "tools.hub.fleet_cli:cancel",
    "rollback": "tools.hub.fleet_cli:rollback",
    "default": "tools.hub.fleet_cli:default",
    "remove": "tools.hub.fleet_cli:remove",
}


@click.group("inferhub", cls=LazyGroup, verbs=VERBS, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Sign, publish and roll out models for inferd.

    \b
    A store from nothing:
      inferhub keygen --role root --out keys/root-a      (root-b and root-c likewise)
      inferhub keygen --role targets --out keys/targets  (online, team and operator likewise)
      inferhub init store --root-key keys/root-a --root-key keys/root-b --root-key keys/root-c \\
          --targets-key keys/targets --online-key keys/online --team demo=keys/team.pub \\
          --operator-key keys/operator.pub --anchor anchor/root.json
      inferhub pack SRC --out BUNDLE
      inferhub publish BUNDLE --store store --team-key keys/team --online-key keys/online --channel stable
      inferhub verify --store store --anchor anchor/root.json --deep
    """


if __name__ == "__main__":
    main()
