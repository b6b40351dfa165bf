"""Reference policies: what the implicit reward beta * log(pi / pi_ref) is measured against."""
