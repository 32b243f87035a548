"""The one place where a film or a sound is opened with FFmpeg (PyAV): known containers only, and no other file.

FFmpeg takes a playlist for a film: the text of an HLS or concat list makes it open what the list names, on the network
too. So each opening names the containers that it allows, none of which refers to other files, and no protocol. The
caller opens the file itself and gives it to FFmpeg as a stream of bytes.
"""

from typing import TYPE_CHECKING, Any, BinaryIO

from foundation.errors import UserError
from foundation.extras import import_extra

if TYPE_CHECKING:
    from av.container import InputContainer

# FFmpeg's demuxers by name. Playlists (hls, concat, dash, sdp) are left out, because they open further files; so are
# text, pictures and raw samples, for which FFmpeg takes many files that are none.
FILM_FORMATS = (
    "3g2,3gp,asf,avi,dv,flv,gxf,h261,h263,h264,hevc,ivf,live_flv,m4v,matroska,mjpeg,mov,mp4,mpeg,mpegts,mpegvideo,mxf,"
    "nsv,nut,obu,ogg,rm,vc1,webm,wtv"
)
SOUND_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,au,caf,dsf,dts,dtshd,eac3,flac,g722,gsm,iff,ircam,loas,mlp,mp3,mpc,mpc8,"
    "nistsphere,oma,osq,qoa,shn,sln,sox,spdif,tak,truehd,tta,voc,w64,wav,wsd,wv,xwma"
)


def open_media(file: BinaryIO, extra: str, *, container_format: str | None = None, **options: str) -> "InputContainer":
    """Open a film or a sound with PyAV.

    Args:
        file: the open file, or its bytes in an `io.BytesIO`; the caller closes it.
        extra: the extra that installs PyAV for the caller: "video" or "speech".
        container_format: name of the demuxer for a file without a header, such as "g722"; None finds it from the bytes.
        options: further options of the demuxer.

    Returns:
        the open container, which the caller closes. Tags that are not UTF-8 do not matter.

    Raises:
        UserError: not a film or sound in one of the formats above, such as a playlist, or broken at its start; the
            message does not name the file.
        MissingExtraError: PyAV is not installed.
    """
    av = import_extra("av", extra, "video" if extra == "video" else "sound")
    allowed: dict[str, Any] = {
        "format_whitelist": f"{FILM_FORMATS},{SOUND_FORMATS}",
        "protocol_whitelist": "none",  # no protocol has this name
    }
    try:
        return av.open(file, format=container_format, options={**options, **allowed}, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise UserError(
            f"not a video or sound in a known format, or broken or truncated at its start ({error.strerror}); "
            "pictures are without sound, and playlists are not followed: give the file itself"
        ) from None
