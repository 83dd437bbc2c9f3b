"""The HTML page that reports are made of: one style sheet, one base template."""
