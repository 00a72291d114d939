"""The coordinator: one light process that aggregates masked updates and can read only the sum."""
