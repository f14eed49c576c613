"""What goes wrong on a bad day, made on purpose, and a checker that finds what was lost or made twice."""
