// What the page says, in each of its languages; a test compares their keys.

export const languages = {
  en: {
    skip: "Skip to content", main: "Main", docs: "API docs", signOut: "Sign out", other: "中文", otherCode: "zh",
    setUp: "Set up VideoFly", setUpHint: "The first account is the administrator's.", setUpButton: "Make the account",
    setUpNoToken: "Open the link that the server printed when it started.",
    signIn: "Sign in", signUp: "Make an account", noAccount: "No account yet?", haveAccount: "You have an account?",
    email: "E-mail", password: "Password", passwordHint: "8 characters or more.",
    home: "Your account", credits: "Credits", available: "available", frozen: "set aside", used: "spent",
    soon: "expire within a week",
    keys: "API keys", noKeys: "You have none yet.", makeKey: "Make a key", keyName: "Name of the key",
    keyOnce: "Copy it now: it is not shown again.", keyUse: "Programs send one as “Authorization: Bearer vf_…”.",
    lastUsed: "last used", neverUsed: "never used",
    revoke: "Revoke", revokeKey: "Revoke the key", revokeMeans: "Programs that use it stop working at once.",
    offline: "The server cannot be reached.", E4010: "The e-mail address or the password is wrong.",
    E4014: "Too many attempts. Wait a little, then try again.", E4016: "There is an account with that e-mail address.",
    E4020: "Nobody can sign up here without an invitation.", E4022: "That link was used, or is not valid any more.",
  },
  zh: {
    skip: "跳到正文", main: "主菜单", docs: "API 文档", signOut: "退出", other: "English", otherCode: "en",
    setUp: "初始化 VideoFly", setUpHint: "第一个账户就是管理员。", setUpButton: "创建账户",
    setUpNoToken: "请打开服务器启动时打印的链接。",
    signIn: "登录", signUp: "注册", noAccount: "还没有账户？", haveAccount: "已有账户？",
    email: "邮箱", password: "密码", passwordHint: "至少 8 个字符。",
    home: "我的账户", credits: "积分", available: "可用", frozen: "冻结", used: "已用",
    soon: "一周内到期",
    keys: "API 密钥", noKeys: "还没有密钥。", makeKey: "创建密钥", keyName: "密钥名称",
    keyOnce: "请立即复制：它不会再次显示。", keyUse: "程序以“Authorization: Bearer vf_…”发送密钥。",
    lastUsed: "上次使用", neverUsed: "从未使用",
    revoke: "吊销", revokeKey: "吊销密钥", revokeMeans: "使用它的程序将立即无法访问。",
    offline: "无法连接服务器。", E4010: "邮箱或密码错误。",
    E4014: "尝试次数过多，请稍后再试。", E4016: "该邮箱已有账户。",
    E4020: "没有邀请无法在此注册。", E4022: "该链接已被使用或已失效。",
  },
}

const chosen = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en")
document.documentElement.lang = chosen === "zh" ? "zh-Hans" : "en"
export const words = languages[chosen]

export function otherLanguage() {
  localStorage.setItem("language", words.otherCode)
  location.reload()
}

// A refusal in the reader's language where we know it, else in the server's words.
export const say = (problem) => words[problem.code] ?? problem.message

export const date = (text) => new Intl.DateTimeFormat(chosen, { dateStyle: "medium", timeStyle: "short" }).format(new Date(text))
