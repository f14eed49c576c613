"""What the provider costs, next to the bare tools and next to what people do otherwise. See README.md."""
