"""What both sides of a federation speak: values, maths, files, configuration. Imports nothing of server or client."""
