"""The WebUI's faces of a request: controls, arguments, infotext paste, XYZ axes; all derived from the schema."""
