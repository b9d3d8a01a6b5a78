"""The played routes, one module a noun: `(Call, Stock) -> Answer`, errors as SandboxError."""
