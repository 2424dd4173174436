"""Reports: tables and figures of results. No other module of the library depends on this package."""
