"""The questions of three papers, asked of this code: plans that were fixed first, their runs, tables and pages."""
