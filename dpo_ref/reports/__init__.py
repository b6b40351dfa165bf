"""What people and other tools read: tables, pictures, pages, model cards, export files."""
