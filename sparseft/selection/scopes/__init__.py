"""Among which entries a budget is ranked: all together, by parameter, layer, row, column or block; or whole units."""

from sparseft.selection.scopes.groups import Scope, budgets, check_groups, largest
from sparseft.selection.scopes.layouts import Layout, layouts
from sparseft.selection.scopes.shares import shares
from sparseft.selection.scopes.streamed import Selected, largest_stored
from sparseft.selection.scopes.tiles import Structure
from sparseft.selection.scopes.units import largest_units

__all__ = [
    "Layout",
    "Scope",
    "Selected",
    "Structure",
    "budgets",
    "check_groups",
    "largest",
    "largest_stored",
    "largest_units",
    "layouts",
    "shares",
]
