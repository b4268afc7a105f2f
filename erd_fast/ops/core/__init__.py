"""How an op is declared, which backend runs it, and what that choice depends on."""
