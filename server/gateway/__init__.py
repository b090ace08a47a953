"""The one door of a coordinator that participants see: Flower's fleet routes, and pages to read."""
