"""How each kind of operation gives per-example gradients: `uses` holds the arithmetic, `recorder` finds the uses."""
