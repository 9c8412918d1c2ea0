"""What the book's notebooks print and draw, and what compiles them. No training needs it."""
